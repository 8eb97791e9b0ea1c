"""Measuring policies in the twin: trials, statistics and reports (section 4.2, appendices D.1, D.3 and D.6)."""
