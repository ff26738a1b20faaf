"""What can be configured, and where a value comes from.

sections                `Config` and its sections: every field with its default
values, paths, secret   what a field may hold
sources                 arguments, environment, files, and errors
reference               a configuration in print, and the reference in docs/configuration.md
"""
