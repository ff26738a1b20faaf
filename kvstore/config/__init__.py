"""All settings, and the sources of their values.

sections                `Config` and its sections: every field with its default
values, paths, secret   what a field may hold
sources                 arguments, environment, files, and errors
reference               a configuration in print, and the reference in docs/configuration.md
"""
