"""Folders of weights as Hugging Face's libraries have them: which there are, how they are read, how they are written."""
