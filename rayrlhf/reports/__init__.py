"""What people see of a run: progress lines, warnings, tables, figures, report.html."""
