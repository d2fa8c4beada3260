"""The arithmetic and the native code as Python sees them: floats, Philox, records as bytes, libraries and drivers."""
