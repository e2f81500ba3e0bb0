"""What a tensor looks like that should be a merge and is not: the bare base, another scale, another adapter.

`evidence` looks at the tensors once more, `strengths` finds how much of each delta is in them, `judgement` decides,
`phrases` has the words, and `likeness` does it for all tensors of a plan.
"""
