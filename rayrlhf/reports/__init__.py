"""A run as people see it: progress lines, warnings, tables, figures, report.html."""
