"""Interventions: the parts that experiments share: paired runs, ablation values, grids, controls and audits."""
