"""The stages of the line: what each reads, when it has to run again, and the folder that it writes."""
