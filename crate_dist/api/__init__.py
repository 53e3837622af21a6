"""What `import crate_dist` offers: trained models, shards as a data set, and training, from Python and notebooks."""
