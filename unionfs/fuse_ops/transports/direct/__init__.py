"""The transport that reads /dev/fuse itself: what pyfuse3 cannot express, with less time per request."""
