"""Runs of finetune, seen from their folders: listed, compared, and made into pages. It needs no torch."""
