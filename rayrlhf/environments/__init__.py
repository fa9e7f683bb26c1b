"""What answers a policy that writes in turns: a game, a tool, another speaker.

    prompt    turn 1           observation     turn 2
    given     policy writes    environment     policy writes       one trajectory

Only the tokens that the policy wrote are trained on.
`environment` of the config names a class in a file of your own; `rayrlhf.environments.guess` is an example.
"""
