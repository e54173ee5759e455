"""Describing clips: who is asked (engines), what is an answer (faults), and how the work goes on (journal)."""
