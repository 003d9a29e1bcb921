"""Looks into models: what a pixel reads, what each route adds, where tokens flow, by which matrix layers mix them."""
