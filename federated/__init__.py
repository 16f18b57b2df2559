"""Federated averaging on TensorFlow Federated over the same model builders.

This package imports `tfprivacy_ft`, never the other way round, and is the only one that imports TensorFlow Federated.
"""
