"""Where does the mismatch come from: which rung, which setting, which layer?"""
