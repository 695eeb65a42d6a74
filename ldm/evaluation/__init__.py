"""Evaluation: metrics of pictures with intervals and provenance, feature networks, the report."""
