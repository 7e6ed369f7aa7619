"""Halting and drafting heads of a recursive model: fitted, chosen and measured."""
