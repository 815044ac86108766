"""The main job, ``python -m fimkit``: influence on scikit-learn's digits, flipped labels found."""
