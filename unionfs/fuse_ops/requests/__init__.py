"""What each request means for the tree."""
