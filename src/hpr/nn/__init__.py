"""The modules that stand in a compressed model: bank, linear, embedding, experts.

How a forward pass finds its factors, in short::

    class FactorBank(nn.Module):              # one, on the base model: base.hpr_bank
        def __getitem__(self, name):          # "encoder.layer.3.output.dense:u" -> a Factor (an nn.Linear without bias)
            return self.factors[module_name(name)]

    class SharedLinear(nn.Module):            # replaces the nn.Linear of a site
        def __init__(self, bank, terms, source, path):
            self._bank = (bank,)              # in a tuple: not a submodule, so factors are saved once, by the bank

        def forward(self, x):                 # y = sum over terms of U (V x), plus the private bias
            return sum(self.bank[term.u](self.bank[term.v](x)) for term in self.terms) + self.bias

Two sites share a factor if their terms name the same one. ``sharing.attach`` puts the bank and these modules into a model;
``plans.terms`` says what a term is, and ``plans.product`` turns terms into the dense matrix.
"""
