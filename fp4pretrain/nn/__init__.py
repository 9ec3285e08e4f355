"""megatron-core's linears with recipes, and the norm and attention that belong to them."""
