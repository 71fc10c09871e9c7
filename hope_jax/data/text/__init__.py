"""Text: which documents (files.py), what is held out (corpus.py), tokens (tokenizers.py), windows on disk (windows.py).

``open_text`` in text_data.py does all of it. Read corpus.py next.
"""
