"""What things cost, beside a peer in the same process; results/ holds what was measured."""
