"""Deployment to a Triton model repository: configuration, versions, rollback, golden outputs."""
