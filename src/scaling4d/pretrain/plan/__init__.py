"""What a scaling point costs on a cluster: closed form, dry run, performance model."""
