"""Finding, building and declaring the native library."""
