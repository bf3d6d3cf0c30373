"""The report of a run: report.json for machines, report.html for people."""
