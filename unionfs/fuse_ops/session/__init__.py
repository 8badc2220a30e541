"""One mount's life: mounting, serving, the mount record, the supervisor."""
