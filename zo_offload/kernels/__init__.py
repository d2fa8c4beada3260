"""Arithmetic and native code as used from Python: floats, Philox, records as bytes, libraries and drivers."""
