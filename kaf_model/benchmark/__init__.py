"""Few-label experiments: data sets, protocols, plans, the runner and its report.

A plan names a data set, a protocol, rows (methods) and columns (how much is labelled). `runs` turns it
into single trainings, `runner` does them one after the other into a folder each, and `report` makes the
tables and curves from those folders.
"""
