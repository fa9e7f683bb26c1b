"""The page on which people rank answers: a Starlette application, its templates, and one script without a build."""
