"""Edits with a known right answer: methods compared on scenes whose edited picture can be drawn."""
