"""Explanation quality, tracked while a vision model learns."""
