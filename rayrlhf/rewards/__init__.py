"""What says how good a response is: reward functions, the gold measure, labellers, ROUGE."""
