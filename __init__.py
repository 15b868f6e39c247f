"""edgepress takes a trained transformer to an edge device, with measured proof that it still does its job."""
