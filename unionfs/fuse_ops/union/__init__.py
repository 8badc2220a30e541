"""The union as one object, and what may be changed of it: names, and attributes."""
