"""Codecs by class: what a page becomes where it is stored, and how near to the page it is that comes back."""
