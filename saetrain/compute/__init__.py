"""Arithmetic that every room builds on: sums over ranks, sparse products, exact selection of the largest."""
