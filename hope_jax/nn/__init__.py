"""Layers and models in linen: ``layers.py``, the mixers, ``cms.py``, and ``language_model.py`` around them."""
