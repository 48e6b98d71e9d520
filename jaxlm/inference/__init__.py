"""Trained models: loading, sampling and likelihoods."""
