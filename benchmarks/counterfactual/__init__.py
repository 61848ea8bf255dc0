"""Edits with ground truth: methods compared on scenes whose edited image can be rendered."""
