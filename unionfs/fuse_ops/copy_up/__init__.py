"""From a lower layer to the upper directory."""
