"""Draws the figures of CRATE's papers, of any trained model and any pictures, for a page of text."""
