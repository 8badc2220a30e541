"""The portable transport: pyfuse3, with any kernel."""
