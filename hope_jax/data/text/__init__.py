"""Text: which documents (files.py), what is held out (corpus.py), tokens (tokenizers.py), windows on disk (windows.py).

``open_text`` in text_data.py does all of it; shards.py and tokenizing.py do it for large corpora, in many processes.
Read corpus.py next.
"""
