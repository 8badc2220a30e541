"""What limits an upper directory."""
