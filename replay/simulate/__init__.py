"""The real router and load tracker in virtual time, on modelled backends: what a policy does as load comes and goes."""
