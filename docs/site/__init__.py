"""The documentation as a site: `python -m docs.site FOLDER` writes what mkdocs builds (`make docs`)."""
