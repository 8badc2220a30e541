"""The documentation as a site: what mkdocs is given beside docs/."""
