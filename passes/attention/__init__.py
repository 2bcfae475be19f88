"""Sparse attention: which blocks of keys each block of queries reads. patterns/ are fixed by position."""
