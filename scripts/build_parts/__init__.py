"""What is published: how source, wheels and Debian packages are made."""
