"""Layer contents as change lists."""
